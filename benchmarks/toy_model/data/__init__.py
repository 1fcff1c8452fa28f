"""Pictures, clips and questions, drawn from seeds."""
