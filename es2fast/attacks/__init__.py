"""Attacks on aligned language models: one contract (`base`), found by name (`registry`).

`direct` asks plainly; `states/` edits hidden states; `weights/` changes the model itself.
"""
