"""What a question gives away beside its picture: `places` looks at where patches were kept, `study` asks the questions
of both small models from there and from their texts alone (`world/text_alone.py`)."""
