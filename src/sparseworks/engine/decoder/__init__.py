"""Language models as native programs: what is read of a model, how it is packed, what runs it."""
