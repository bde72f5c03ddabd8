"""A conversion: planned, carried out, summed up."""
