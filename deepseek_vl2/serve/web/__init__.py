"""The web demo: a page to chat with the model about images.

``limits`` and ``state`` hold what a visitor's chat is, ``backend`` the model, ``jobs`` the line in front of it,
``rendering`` how answers look, ``events`` what the buttons do, ``layout`` the page and ``command`` the command line.
Gradio is imported by ``events``, ``layout`` and ``server`` alone.
"""
