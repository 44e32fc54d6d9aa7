"""Neural networks only: no files, no pictures, no devices."""
