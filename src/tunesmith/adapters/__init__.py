"""What is trained beside or inside the weights? LoRA, DoRA and full modules, as values that attach and
detach."""
