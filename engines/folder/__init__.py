"""The files of an engine folder: manifest, weight store, journal of unfinished work, hashes of sources, checksums."""
