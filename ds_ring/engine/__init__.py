"""One forward over many ranks: sequence parallel, or tensor x pipeline parallel, behind one interface."""
