"""The mathematics of TAC on arrays and tensors: no Ray, no FAISS, no files."""
