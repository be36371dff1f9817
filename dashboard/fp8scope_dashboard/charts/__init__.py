"""What is drawn: figures as plain dicts for plotly.js."""
