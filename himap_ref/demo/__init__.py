"""A page to play with: `python -m himap_ref.demo`. The only part that needs Gradio (extra "demo")."""
