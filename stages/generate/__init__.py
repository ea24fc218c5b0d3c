"""Stage 1: run the teacher with guidance and record what its denoiser and its scheduler were given."""
