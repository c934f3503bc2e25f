#!/bin/sh
# A relay on each core of this machine, named by its port, behind nginx. Needs systemd and Debian's nginx, Bun and the relay
# where party-sockets.service has them, and root:
#   ops/deploy/all-cores.sh [RELAYS]        as many relays as this, rather than one a core
# Variables for all of them go to /etc/party-sockets.env; journalctl -u 'party-sockets@*' is their log. How to put a new version
# there without ending a game: ops/operators.md.
# To change their number, run it again and restart the relays, which learn of each other when they start; stop by hand what is
# too many: systemctl disable --now party-sockets@4504
set -eu
cd "$(dirname "$0")"
first=4501
relays=${1:-$(nproc)}
units=/etc/systemd/system

if grep -Eqs '^ *(PORT|HOST|INSTANCE_ID|PEERS|PEER_ADDRESS)=' /etc/party-sockets.env; then
  echo "PORT, HOST, INSTANCE_ID, PEERS and PEER_ADDRESS can't be the same for all relays: take them out of /etc/party-sockets.env" >&2
  exit 1
fi

ports=$(seq "$first" $((first + relays - 1)))
peers=$(echo $ports | tr ' ' ,)

# One unit for all, and what differs.
mkdir -p "$units/party-sockets@.service.d"
cp party-sockets.service "$units/party-sockets@.service"
cat >"$units/party-sockets@.service.d/all-cores.conf" <<END
[Service]
Environment=PORT=%i HOST=127.0.0.1 INSTANCE_ID=%i PEERS=$peers PEER_ADDRESS=127.0.0.1:{id}
END

# nginx-relays.conf with these ports; nginx-cluster.conf only if it isn't there, because an operator has changed it since.
while IFS= read -r line; do
  case $line in
  *"server 127.0.0.1:$first "*) for port in $ports; do printf '%s\n' "$line" | sed "s/:$first /:$port /"; done ;;
  *"server 127.0.0.1:"*) ;;
  *) printf '%s\n' "$line" ;;
  esac
done <nginx-relays.conf >/etc/nginx/conf.d/party-sockets-relays.conf
cp --no-clobber nginx-cluster.conf /etc/nginx/conf.d/party-sockets.conf

systemctl daemon-reload
for port in $ports; do systemctl enable --now "party-sockets@$port"; done
nginx -t -q
systemctl enable nginx
systemctl reload-or-restart nginx
