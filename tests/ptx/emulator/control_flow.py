"""Which block follows which, and in which order they are executed: threads that leave a loop early, or take the other
side of a branch, wait for the rest."""

BRANCHES, EXITS = ("bra", "bra.uni"), ("ret", "exit")


def link(blocks) -> list[int]:
    """Fills in the blocks' successors. Returns each block's priority; of those with threads in them the lowest runs."""
    labels = {block.label: i for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        block.falls = i + 1 if i + 1 < len(blocks) else None
        last = block.last
        if last is None or last.op not in BRANCHES + EXITS:
            continue
        if last.op in BRANCHES:
            target = last.operands[0]
            block.taken = labels.get(f"{target}@{last.scope}", labels.get(target))
        if last.predicate is None:
            block.falls = None
    edges = {i: [j for j in (b.taken, b.falls) if j is not None] for i, b in enumerate(blocks)}
    order = [0] * len(blocks)
    for rank, i in enumerate(_loop_order(set(range(len(blocks))), 0, edges)):
        order[i] = rank
    return order


def _loop_order(nodes, entry, edges) -> list[int]:
    """Topological, every loop (strongly connected component) in one stretch, its header first."""
    components = _components(nodes, entry, edges)
    reachable = {node for component in components for node in component}
    result = []
    for component in components:
        if len(component) == 1:
            result += component
            continue
        inside = set(component)
        outside = reachable - inside
        header = entry
        if entry not in inside:
            header = next(v for v in component if any(v in edges[u] for u in outside))
        cut = {v: [w for w in edges[v] if w in inside and w != header] for v in inside}
        result += _loop_order(inside, header, cut)
    return result


def _components(nodes, entry, edges) -> list[list[int]]:
    """Tarjan's, of what can be reached from `entry`, in topological order."""
    found, index, low, stack, on_stack = [], {}, {}, [], set()

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        on_stack.add(v)
        for w in edges[v]:
            if w not in nodes:
                continue
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in on_stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            component = []
            while not component or component[-1] != v:
                component.append(stack.pop())
                on_stack.discard(component[-1])
            found.append(component)

    visit(entry)
    return found[::-1]
