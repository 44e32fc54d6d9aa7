"""Weight sets: their manifests, download and verification."""
