"""Ways to put the pictures of a prompt in order: `reranker` says what each can do, the others are one each."""
