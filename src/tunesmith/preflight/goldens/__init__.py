"""What do torch, PEFT and TRL compute for a small model? Their losses, gradients and updates, and the model
and rows, made from seeds, for which they computed them.

``sft.safetensors`` and ``preferences.safetensors`` were written by scripts of the same names in
``tests/goldens``, which need torch; to compare with them needs none (`compared`)."""
