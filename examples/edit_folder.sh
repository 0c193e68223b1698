#!/usr/bin/env bash
# A saved Hugging Face folder, edited at a price:  examples/edit_folder.sh FOLDER TEXT HELD_OUT EDITED
# Curvature of TEXT, general text of the kind that the model is to keep; HELD_OUT is the text on which the edit may cost
# 2 % of perplexity. Layers and price by the environment: LAYERS=linear PRICE=1.05 examples/edit_folder.sh ...
set -euo pipefail
folder=$1 text=$2 held_out=$3 edited=$4
factors=$(mktemp -d)/factors.safetensors
lightning-curvature collect --model "$folder" --corpus "$text" --layers "${LAYERS:-mlp}" --out "$factors"
lightning-curvature edit --checkpoint "$folder" --factors "$factors" --perplexity "${PRICE:-1.02}" --corpus "$held_out" --out "$edited"
lightning-curvature inspect "$edited"
