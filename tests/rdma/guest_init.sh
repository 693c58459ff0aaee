#!/bin/bash
# The guest's only service: modules, two soft-RoCE devices, then /out/command.sh; its exit code goes to /out/exit_code.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
for word in $(cat /proc/cmdline); do
  case $word in guest.modules=*) modules=${word#guest.modules=};; guest.nixl=*) nixl=${word#guest.nixl=};;
    guest.checkout=*) checkout=${word#guest.checkout=};; esac
done
mount -t tmpfs t /run; mkdir /run/checkout; mount --bind "$checkout" /run/checkout
mount -t tmpfs t /tmp; mkdir -p "$checkout"; mount --bind /run/checkout "$checkout"  # it may lie in /tmp
ln -sf /proc/self/fd /dev/fd; ln -sf fd/0 /dev/stdin; ln -sf fd/1 /dev/stdout; ln -sf fd/2 /dev/stderr
mkdir -p /dev/shm /dev/pts /out; mount -t tmpfs s /dev/shm; mount -t devpts p /dev/pts
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=none out /out
mkdir -p "/lib/modules/$(uname -r)"; mount --bind "$modules/lib/modules/$(uname -r)" "/lib/modules/$(uname -r)"
ulimit -l unlimited; ulimit -n 65536; hostname guest; ip link set lo up
ln -sf kmod /usr/bin/modprobe
modprobe -a ib_uverbs rdma_ucm rdma_rxe veth af_packet

# Two devices on the ends of one wire, both in the first network namespace: rxe of Linux 6.1 knows no other. One host owns both addresses, so
# the kernel must be told to accept its own as a source, and which way each neighbour lies.
ip link add v0 type veth peer name v1
sysctl -qw net.ipv4.conf.all.rp_filter=0
for i in 0 1; do
  sysctl -qw net.ipv6.conf.v$i.disable_ipv6=1 net.ipv4.conf.v$i.accept_local=1 net.ipv4.conf.v$i.rp_filter=0 \
    net.ipv4.conf.v$i.arp_ignore=1 net.ipv4.conf.v$i.arp_announce=2
  ip link set v$i mtu 4200 up; ip addr add 10.9.0.$((i + 1))/24 dev v$i
done
ip neigh replace 10.9.0.2 lladdr "$(cat /sys/class/net/v1/address)" dev v0
ip neigh replace 10.9.0.1 lladdr "$(cat /sys/class/net/v0/address)" dev v1
for i in 0 1; do rdma link add rxe$i type rxe netdev v$i; done

# NIXL's wheel brings a libibverbs that looks for drivers where Debian has none, and Debian's soft-RoCE driver registers with Debian's.
for library in "$nixl"/libibverbs-*.so*; do
  mount --bind /usr/lib/x86_64-linux-gnu/libibverbs.so.1 "$library"
done
echo "guest is up: $(uname -r), $(cut -d' ' -f1 /proc/uptime) s"
bash /out/command.sh > >(tee /out/output.log) 2>&1
code=$?; sleep 0.2
echo $code > /out/exit_code; sync
echo "guest is down: exit code $code, $(cut -d' ' -f1 /proc/uptime) s"
echo o > /proc/sysrq-trigger; sleep 10
