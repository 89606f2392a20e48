"""Document mining: the documents of a corpus that are nearest to questions and answers."""
