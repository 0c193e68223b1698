"""What one training or validation step did: inputs and output gradients of layers, and the loss behind them."""
