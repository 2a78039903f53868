"""`nnunet-ssl compare`: the jobs, one job, and the table of their results."""
