"""The operator's web console: `vla-post console`, or the node `console`.

access.py   who may do what: tokens, sessions, hosts and origins, rates
lease.py    one operator per cell
drive.py    a hold: the browser's deadman and axes become the operator's hand
desk.py     one cell: its link, its viewers, its operator
sight.py    what there is to see of it, as JSON
hub.py      one browser: what it gets, what it says
commands.py every control, with what it needs and how it is audited
episodes.py learning.py   stores, metrics and versions, read for people
app.py server.py          routes, headers, the process
static/     the page: plain ES modules, no build step

The web side knows no ROS: it talks to `robot_bridge.client.CellClient`.
"""
