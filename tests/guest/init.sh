#!/bin/busybox sh
# First process of a sliver under test: makes its root as sliver-init does, runs /test in it, says how it ended, and ends the machine.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox mkdir -p /dev /proc /sys /base /disk /root
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
prepare() {
    mount -t erofs -o ro,dax=always /dev/pmem0 /base &&
    mount -o bind /dev /base/dev &&
    chroot /base mke2fs -q -F -t ext4 /dev/vda &&
    umount /base/dev &&
    mount -t ext4 -o noatime /dev/vda /disk &&
    mkdir -p /disk/upper /disk/work &&
    mount -t overlay -o lowerdir=/base,upperdir=/disk/upper,workdir=/disk/work none /root || return 1
    # Where sliver-init has parts of the disk itself, for layers of containers.
    for layers in docker containerd containers; do
        mkdir -m 0711 /disk/$layers && mount -o bind /disk/$layers /root/var/lib/$layers || return 1
    done
    for each in dev proc sys; do mount -o move /$each /root/$each || return 1; done
    cp /test /root/test
    cd /root && mount -o move . /
}
if prepare; then
    chroot . /bin/bash -c '
        mount --make-rshared /
        chmod 0666 /dev/net/tun /dev/fuse
        mkdir -p /dev/pts /dev/shm /dev/mqueue
        mount -t devpts -o gid=5,mode=0620,ptmxmode=0666 none /dev/pts
        mount -t tmpfs none /dev/shm
        mount -t tmpfs none /run
        mount -t tmpfs none /tmp
        chmod 1777 /dev/shm /tmp
        mount -t cgroup2 none /sys/fs/cgroup
        for link in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -sf /proc/self/${link#*:} /dev/${link%%:*}; done
        echo 127.0.0.1 localhost > /etc/hosts
        ip link set lo up
        export HOME=/root LC_ALL=C.UTF-8
        exec /bin/bash /test'
    echo "sliver: the test ended with status $?"
else
    echo "sliver: no root file system"
    reboot -f
fi
chroot . /bin/busybox reboot -f
