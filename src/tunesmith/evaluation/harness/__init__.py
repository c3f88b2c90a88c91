"""How are EleutherAI's benchmarks asked? Their tasks, requests and documents."""
