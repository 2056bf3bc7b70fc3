"""What kvcellar's connector relies on in vLLM, as facts taken from source text: no vLLM has to be installed.

`sources` reads modules, `shapes` writes them down as short strings, `facts` collects the facts of one vLLM version,
`ours` reads kvcellar's own sources, `rules` compares the two. The facts of the supported versions lie here as JSON.
"""
