#!/bin/busybox sh
# First process of the guest: reaches the host's root over 9p, puts the RDMA libraries and a writable layer over it, and moves there.
b=/bin/busybox
$b mount -t proc p /proc; $b mount -t sysfs s /sys; $b mount -t devtmpfs d /dev
for m in $($b cat /modules/order); do
  case $m in
    *.xz) $b xzcat /modules/$m > /modules/x.ko; $b insmod /modules/x.ko;;
    *) $b insmod /modules/$m;;
  esac || echo "insmod $m failed"
done
for word in $($b cat /proc/cmdline); do
  case $word in guest.init=*) init=${word#guest.init=};; esac
done
die() { echo "first init: $*"; $b poweroff -f; }
reach() { $b mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose "$1" "$2" || die "no 9p share $1"; }
reach hostroot /host
reach libraries /libraries
$b mount -t tmpfs -o size=75% t /layer; $b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/libraries:/host,upperdir=/layer/upper,workdir=/layer/work o /root || die "no overlay"
for d in proc sys dev; do $b mkdir -p /root/$d; $b mount -o move /$d /root/$d; done
exec $b switch_root /root /bin/bash "$init" </root/dev/ttyS0 >/root/dev/ttyS0 2>&1
