"""The loop around model and data: training, measuring, studies, reports, the command line."""
