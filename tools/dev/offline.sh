#!/bin/sh
# Run a command without a network: in a namespace that has only the loopback device. If the system forbids namespaces,
# proxies refuse every request instead.
#
#   tools/dev/offline.sh COMMAND [ARGUMENT ...]
if unshare --map-root-user --net true 2>/dev/null; then
    echo "network: off, a namespace with the loopback device only" >&2
    # shellcheck disable=SC2016
    exec unshare --map-root-user --net sh -c 'ip link set lo up && exec "$@"' sh "$@"
fi
echo "network: proxies that refuse, because namespaces are not allowed here" >&2
refuse=http://127.0.0.1:9
exec env http_proxy=$refuse https_proxy=$refuse HTTP_PROXY=$refuse HTTPS_PROXY=$refuse "$@"
