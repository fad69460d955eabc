"""A Ray Serve application that classifies live requests with frozen task models, alone or in multiplexed groups."""

from revmux.utils.collection import collect_rarely

collect_rarely()
