"""What people look at: the paper's tables, pages about runs, exported models. Programs: table, run_report, export, scores."""
