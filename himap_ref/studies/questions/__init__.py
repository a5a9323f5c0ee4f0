"""What is asked: about drawn scenes (scenes, drawing), or by files of many layouts.

Whoever adds a kind of question or a layout of question files starts here."""
