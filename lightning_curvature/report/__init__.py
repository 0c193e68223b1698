"""What people see: pictures, the page of a run, and what a file holds."""
