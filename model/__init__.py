"""What is trained: the five floors of a decoder, its parameters and its loss, as pure functions of arrays."""
