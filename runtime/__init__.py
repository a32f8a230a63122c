"""Request to video: command line, media, masks, conditioning, segments, solvers, transformer, VAE streaming."""
