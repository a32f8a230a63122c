"""Masks made inside: from a picture and a clip to the colour masks that SCAIL-2 reads."""
