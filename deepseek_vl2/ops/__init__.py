"""How layers are computed fast: tensors in, tensors out; the plain forms that define them stand in `models`."""
