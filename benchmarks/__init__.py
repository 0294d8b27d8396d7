"""What users and we run to see speed and accuracy; never imported by the library."""
