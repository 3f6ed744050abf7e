"""DeepSeek-VL2 on Ray: a file of questions over a cluster, and replicas of the server behind one address.

Nothing here imports Ray before it is used: the extra ``ray`` brings it.

| module | is for |
| --- | --- |
| `cluster` | joins a cluster or starts a local one, and says how many workers fit |
| `dispatch` | hands lines to workers; each is answered once, whatever dies |
| `app` and the others | Ray Serve: replicas of our server, each conversation on one of them |
"""
