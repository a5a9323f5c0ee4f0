"""What several studies share: results files that resume, asking question by question, figures.

No study of its own."""
