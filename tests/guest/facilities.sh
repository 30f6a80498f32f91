# What the sliver kernel promises, tried one by one with Debian's own tools. Each check prints `ok NAME` or `FAILED NAME: why`; the
# script fails if one did. Run by init.sh as root in a sliver of the base `containers`.
failed=0
# check NAME COMMAND: every command of it must succeed. Not in a condition, where `set -e` would say nothing; not in a shell of its own, which takes
# an emulated machine a quarter of a second to start.
check() {
    local said
    said=$(set -e; eval "$2" 2>&1)
    if [ $? = 0 ]; then echo "ok $1"; else echo "FAILED $1: ${said//$'\n'/ | }"; failed=1; fi
}
# socket NAME DOMAIN TYPE PROTOCOL
socket() { check "socket $1" "perl -e 'socket(my \$s, $2, $3, $4) or die \$!'"; }
# system_call NAME NUMBER ARGUMENTS: its result must not be negative. perl wants strings for the kernel in variables.
system_call() { check "system call $1" "perl -e 'my @a = ($3); my \$r = syscall($2, @a); \$r >= 0 or die \$!'"; }

# --- kinds of links
ip link add d0 numtxqueues 4 type dummy
ip link set d0 up
ip address add 10.1.0.1/24 dev d0
for type in dummy ifb veth bridge bond team nlmon sit ipip gre gretap ip6gre ip6gretap ip6tnl vti vti6 wireguard; do
    check "link $type" "ip link add t0 type $type; ip link delete t0"
done
check 'link vlan' 'ip link add link d0 name t0 type vlan id 5; ip link delete t0'
check 'link macvlan' 'ip link add link d0 name t0 type macvlan mode bridge; ip link delete t0'
check 'link macvtap' 'ip link add link d0 name t0 type macvtap; ip link delete t0'
check 'link ipvlan' 'ip link add link d0 name t0 type ipvlan mode l3s; ip link delete t0'
check 'link ipvtap' 'ip link add link d0 name t0 type ipvtap; ip link delete t0'
check 'link vxlan' 'ip link add t0 type vxlan id 7 remote 10.1.0.2 dstport 4789; ip link delete t0'
check 'link geneve' 'ip link add t0 type geneve id 7 remote 10.1.0.2; ip link delete t0'
check 'link erspan' 'ip link add t0 type erspan seq key 3 local 10.1.0.1 remote 10.1.0.2 erspan_ver 1; ip link delete t0'
check 'link bareudp' 'ip link add t0 type bareudp dstport 6635 ethertype ipv4; ip link delete t0'
check 'link gtp' 'ip link add t0 type gtp role sgsn; ip link delete t0'
check 'link macsec' 'ip link add link d0 name t0 type macsec; ip link delete t0'
check 'link xfrm' 'ip link add t0 type xfrm dev d0 if_id 3; ip link delete t0'
check 'link vrf' 'ip link add t0 type vrf table 10; ip link delete t0'
check 'link tun' 'ip tuntap add t0 mode tun; ip link delete t0'
check 'link tap' 'ip tuntap add t0 mode tap; ip link delete t0'
check 'link l2tp' 'ip l2tp add tunnel tunnel_id 1 peer_tunnel_id 1 encap ip local 10.1.0.1 remote 10.1.0.2
    ip l2tp add session name t0 tunnel_id 1 session_id 1 peer_session_id 1; ip l2tp del tunnel tunnel_id 1'
check 'foo over UDP' 'ip fou add port 5555 ipproto 4; ip fou del port 5555'
check 'Open vSwitch' 'genl ctrl list | grep -q ovs_datapath'
check 'no link that nobody asked for' '[ "$(ls /sys/class/net | grep -v -e ^d0$ -e ^lo$ -e ^eth0$ -e ^bonding_masters$ | wc -l)" = 0 ] || { ls /sys/class/net; false; }'

# --- routing
check 'policy routing' 'ip rule add fwmark 1 ipproto tcp dport 20000-20099 lookup 100; ip rule del fwmark 1'
check 'multipath' 'ip route add 10.9.0.0/16 nexthop via 10.1.0.2 weight 1 nexthop via 10.1.0.3 weight 2'
check 'MPLS' 'echo 100 > /proc/sys/net/mpls/platform_labels; ip -f mpls route add 50 via inet 10.1.0.2 dev d0; ip route add 10.8.0.0/16 encap mpls 60 via 10.1.0.2'
check 'segment routing' 'ip -6 route add fc00:1::/64 encap seg6 mode encap segs fc00:2::1 dev d0'
check 'multicast routing' '[ -e /proc/net/ip_mr_vif ] && [ -e /proc/net/ip6_mr_vif ]'
check 'IPv6' 'ip -6 address add fd00::1/64 dev d0; ip -6 rule add from fd00::/64 lookup 101; busybox ping -6 -c 1 ::1'
check 'IPsec' 'ip xfrm state add src 10.1.0.1 dst 10.1.0.2 proto esp spi 7 mode tunnel \
    aead "rfc4106(gcm(aes))" 0x0102030405060708090a0b0c0d0e0f1011121314 128
    ip xfrm state add src 10.1.0.1 dst 10.1.0.2 proto esp spi 8 enc "cbc(aes)" 0x0102030405060708090a0b0c0d0e0f10 \
    auth "hmac(sha256)" 0x0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20'

# --- congestion control
for algorithm in reno bic cubic westwood htcp highspeed hybla vegas nv scalable lp veno yeah illinois dctcp cdg bbr; do
    check "congestion control $algorithm" "echo $algorithm > /proc/sys/net/ipv4/tcp_congestion_control"
done
echo cubic > /proc/sys/net/ipv4/tcp_congestion_control

# --- queueing disciplines, with what each cannot do without
while read -r discipline options; do
    check "qdisc $discipline" "tc qdisc add dev d0 root handle 1: $discipline $options; tc qdisc del dev d0 root"
done <<'END'
htb default 1
hfsc default 1
prio
multiq
red limit 400000 min 30000 max 90000 avpkt 1000 burst 55 bandwidth 10mbit
sfb
sfq perturb 10
tbf rate 1mbit burst 10k latency 50ms
cbs idleslope 98688 sendslope -901312 hicredit 153 locredit -1389
etf clockid CLOCK_TAI delta 200000
taprio num_tc 2 map 0 1 queues 1@0 1@1 base-time 0 sched-entry S 01 300000 sched-entry S 02 300000 clockid CLOCK_TAI
mqprio num_tc 2 map 0 1 queues 1@0 1@1 hw 0
gred setup DPs 3 default 2 grio
netem delay 10ms 2ms distribution normal loss 1% duplicate 1% reorder 5% 50% rate 1mbit
drr
skbprio
choke limit 1000 bandwidth 10mbit
qfq
codel
fq_codel
cake bandwidth 10mbit
fq
hhf
pie
fq_pie
plug limit 100
ets bands 4
END
check 'qdisc ingress' 'tc qdisc add dev d0 ingress; tc qdisc del dev d0 ingress'
check 'qdisc clsact' 'tc qdisc add dev d0 clsact'
while read -r name filter; do
    check "filter $name" "tc filter add dev d0 egress protocol ip $filter; tc filter del dev d0 egress"
done <<'END'
u32 u32 match ip dport 80 0xffff action drop
flower flower ip_proto tcp dst_port 80 action mirred egress redirect dev lo
bpf bpf bytecode '1,6 0 0 1' action ok
matchall matchall action police rate 1mbit burst 10k conform-exceed drop
fw handle 1 fw action gact drop
basic basic match 'cmp(u8 at 0 layer network mask 0xff gt 3)' action ok
flow handle 1 flow hash keys src,dst divisor 16 baseclass 1:1
cgroup handle 1: cgroup
nat matchall action nat egress 10.1.0.0/24 10.2.0.1
pedit matchall action pedit munge ip ttl set 9 pipe action csum ip
skbedit matchall action skbedit mark 3
skbmod matchall action skbmod swap mac
vlan matchall action vlan push id 9
tunnel_key matchall action tunnel_key set src_ip 1.1.1.1 dst_ip 2.2.2.2 id 3
ct matchall action ct zone 3
mpls matchall action mpls push label 9
connmark matchall action connmark
ctinfo matchall action ctinfo cpmark
sample matchall action sample rate 10 group 3
simple matchall action simple sdata hello
gate matchall action gate clockid CLOCK_TAI sched-entry open 200000000 -1 -1 sched-entry close 100000000 -1 -1
END
check 'netem delays' 'tc qdisc add dev lo root netem delay 60ms
    took=$(busybox ping -c 1 127.0.0.1 | sed -n "s/.*time=\([0-9]*\).*/\1/p"); tc qdisc del dev lo root; [ "$took" -ge 120 ]'

# --- packet filters
cat > /tmp/rules <<'END'
table inet t {
    set s { type ipv4_addr; flags interval, timeout; elements = { 10.0.0.0/8 } }
    map m { type inet_service : verdict; elements = { 80 : accept } }
    flowtable f { hook ingress priority 0; devices = { d0 }; }
    ct helper ftp { type "ftp" protocol tcp; }
    chain prerouting {
        type filter hook prerouting priority mangle;
        ct state established,related accept
        fib daddr . iif type local counter
        fib saddr . iif oif missing drop
        meta l4proto tcp tproxy to :1234 meta mark set 1 accept
        socket transparent 1 accept
        ipsec in reqid 3 drop
        tcp dport 22 meter x { ip saddr limit rate 10/second } accept
        meta mark set numgen random mod 4
        meta mark set jhash ip saddr mod 8
        osf name "Linux" counter
    }
    chain forward {
        type filter hook forward priority filter;
        meta l4proto { tcp, udp } flow add @f
        ct count over 20 reject with tcp reset
        ip saddr @s log prefix "s: " group 1
        tcp dport vmap @m
        tcp dport 21 ct helper set "ftp"
        tcp dport 443 synproxy mss 1460 wscale 7 timestamp sack-perm
        tcp flags syn tcp option maxseg size set rt mtu
        quota over 10 mbytes drop
        queue num 3 bypass
        meta nfproto ipv4 ip daddr 10.4.0.1 drop
        ip dscp cs1 notrack
        reject with icmpx type admin-prohibited
    }
}
table ip n {
    chain copies {
        type filter hook prerouting priority 1
        dup to 10.1.0.2 device "d0"
    }
    chain pre {
        type nat hook prerouting priority dstnat
        tcp dport 8080 dnat to 10.1.0.2:80
        tcp dport 81 redirect to :82
    }
    chain post {
        type nat hook postrouting priority srcnat
        oifname "d0" masquerade random
        ip saddr 10.3.0.0/16 snat to 10.1.0.1
    }
}
table ip6 n {
    chain post {
        type nat hook postrouting priority srcnat
        oifname "d0" masquerade
    }
}
table arp a {
    chain input {
        type filter hook input priority 0
        arp operation request accept
    }
}
table bridge b {
    chain forward {
        type filter hook forward priority 0
        ether type ip ct state new meta ibrname "br0" drop
    }
    chain input {
        type filter hook input priority 0
        reject
    }
}
table netdev d {
    chain ingress {
        type filter hook ingress device d0 priority 0
        ip saddr 10.7.0.0/16 drop
        fwd to lo
    }
    chain egress {
        type filter hook egress device d0 priority 0
        ip daddr 10.7.0.0/16 drop
    }
}
END
check 'nftables' 'nft -f /tmp/rules; nft flush ruleset'
ipset create none hash:ip
for tool in iptables-nft iptables-legacy; do
    while read -r rule; do check "$tool $rule" "$tool $rule"; done <<'END'
-t nat -A POSTROUTING -s 10.3.0.0/16 ! -o d0 -j MASQUERADE
-t nat -A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 80 -j DNAT --to-destination 10.3.0.2:80
-t nat -A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 82
-t nat -A PREROUTING -d 10.5.0.0/24 -j NETMAP --to 10.6.0.0/24
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -p tcp -m multiport --dports 80,443 -m comment --comment web -j ACCEPT
-A FORWARD -m statistic --mode random --probability 0.1 -j DROP
-A FORWARD -m hashlimit --hashlimit-above 10/sec --hashlimit-name h --hashlimit-mode srcip -j DROP
-A FORWARD -p tcp -m connlimit --connlimit-above 9 -j REJECT --reject-with tcp-reset
-A FORWARD -m recent --name r --set -j LOG
-A FORWARD -m limit --limit 1/s -j NFLOG --nflog-group 3
-A FORWARD -m string --string x --algo bm -j NFQUEUE --queue-num 3
-A FORWARD -m time --timestart 08:00 -m length --length 1:99 -m ttl --ttl-gt 3 -m mac --mac-source 02:00:00:00:00:01
-A FORWARD -m physdev --physdev-is-bridged -m set ! --match-set none src -j ACCEPT
-A OUTPUT -m owner --uid-owner 33 -m mark --mark 1 -m cgroup --path / -j ACCEPT
-A OUTPUT -m bpf --bytecode "1,6 0 0 1" -m u32 --u32 "0&0xFF=0x45" -m quota --quota 9 -j ACCEPT
-t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1234 --tproxy-mark 1
-t mangle -A PREROUTING -m socket --transparent -m iprange --src-range 10.0.0.1-10.0.0.9 -j MARK --set-mark 1
-t mangle -A PREROUTING -j CONNMARK --save-mark
-t mangle -A POSTROUTING -j DSCP --set-dscp 8
-t mangle -A POSTROUTING -j CLASSIFY --set-class 1:2
-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-t mangle -A POSTROUTING -j TTL --ttl-set 9
-t mangle -A PREROUTING -j TEE --gateway 10.1.0.2
-t raw -A PREROUTING -m rpfilter --invert -j DROP
-t raw -A PREROUTING -p tcp -j CT --notrack
END
    check "$tool -F" "for table in nat filter mangle raw; do $tool -t \$table -F; done"
done
check 'ip6tables' 'ip6tables -t nat -A POSTROUTING -o d0 -j MASQUERADE; ip6tables -A FORWARD -m frag --fragmore -m rt --rt-type 0 -j DROP; ip6tables -t nat -F; ip6tables -F'
check 'ebtables' 'ebtables-legacy -A FORWARD -p IPv4 --ip-dst 10.0.0.1 -j DROP; ebtables -A FORWARD -p ARP -j DROP; ebtables -F'
check 'arptables' 'arptables -A INPUT -s 10.0.0.1 -j DROP; arptables -F'
for type in bitmap:ip bitmap:port hash:ip hash:mac hash:net hash:ip,port hash:ip,port,ip hash:ip,port,net hash:net,net hash:net,port hash:net,iface list:set; do
    options=; case $type in bitmap:ip) options='range 10.0.0.0/24' ;; bitmap:port) options='range 1-99' ;; esac
    check "ipset $type" "ipset create s $type $options; ipset destroy s"
done
check 'IPVS' 'ipvsadm -A -t 10.1.0.1:80 -s wrr; ipvsadm -a -t 10.1.0.1:80 -r 10.1.0.2 -m; ipvsadm -C'

# --- sockets (the numbers are Linux's: families, SOCK_STREAM 1, SOCK_DGRAM 2, SOCK_RAW 3, SOCK_SEQPACKET 5)
socket MPTCP 2 1 262
socket SCTP 2 1 132
socket DCCP 2 6 33
socket 'raw IPv4' 2 3 1
socket 'raw IPv6' 10 3 58
socket packet 17 3 768
socket AF_XDP 44 3 0
socket AF_ALG 38 5 0
socket AF_KEY 15 3 2
socket KCM 41 2 0
socket vsock 40 1 0
check 'PPP' '[ -c /dev/ppp ] && grep -q PPPOE /proc/net/protocols'
check 'TLS in the kernel' 'grep -q TlsCurrTxSw /proc/net/tls_stat'
check 'pings without privilege' 'echo 0 65535 > /proc/sys/net/ipv4/ping_group_range; perl -e "socket(my \$s, 2, 2, 1) or die \$!"'

# --- what programs need
system_call 'bpf (a map)' 321 '0, pack("LLLLL", 2, 4, 4, 1, 0) . "\0" x 100, 72'
system_call io_uring_setup 425 '4, "\0" x 120'
system_call userfaultfd 323 1
system_call memfd_create 319 '"x", 0'
system_call perf_event_open 298 'pack("LLQ", 1, 120, 0) . "\0" x 104, 0, -1, -1, 0'
system_call add_key 248 '"user", "a", "b", 1, -3'
system_call kcmp 312 '0+$$, 0+$$, 2, 0, 0'
check 'eBPF compiled' '[ $(cat /proc/sys/net/core/bpf_jit_enable) = 1 ]; mount -t bpf none /sys/fs/bpf; bpftool map create /sys/fs/bpf/m type hash key 4 value 4 entries 8 name m; bpftool map update pinned /sys/fs/bpf/m key 1 0 0 0 value 2 0 0 0; bpftool map lookup pinned /sys/fs/bpf/m key 1 0 0 0 | grep -q 02'
check 'kprobes and tracepoints' 'mount -t tracefs none /sys/kernel/tracing; cd /sys/kernel/tracing; echo "p:mine do_sys_openat2" > kprobe_events
    echo 1 > events/kprobes/mine/enable; echo 1 > events/sched/sched_switch/enable; cat /etc/hosts > /dev/null
    echo 0 > events/enable; grep -q mine: trace; grep -q sched_switch: trace; echo > kprobe_events'
check 'message queues' 'mount -t mqueue none /dev/mqueue'
check 'binfmt_misc' 'mount -t binfmt_misc none /proc/sys/fs/binfmt_misc'
check 'huge pages' 'echo 2 > /proc/sys/vm/nr_hugepages; [ $(cat /proc/sys/vm/nr_hugepages) = 2 ]; echo 0 > /proc/sys/vm/nr_hugepages'
check 'loop device, ext4 in a file' 'truncate -s 8M /tmp/f; mke2fs -q -t ext4 /tmp/f; mkdir -p /tmp/m; mount -o loop /tmp/f /tmp/m; umount /tmp/m'
check 'swap file' 'dd if=/dev/zero of=/var/tmp/swap bs=1M count=4 status=none; losetup -f /var/tmp/swap; dev=$(losetup -n -O NAME -j /var/tmp/swap); mkswap -q $dev; swapon $dev; swapoff $dev; losetup -d $dev'
check 'file systems' 'for fs in overlay fuse 9p squashfs iso9660 vfat erofs ext4 tmpfs; do grep -qw $fs /proc/filesystems || { echo no $fs; exit 1; }; done'
check 'FUSE' 'mkdir -p /tmp/l /tmp/u /tmp/w /tmp/m; fuse-overlayfs -o lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w /tmp/m; echo x > /tmp/m/x; umount /tmp/m; [ -e /tmp/u/x ]'
check 'control groups' 'for c in cpuset cpu io memory hugetlb pids rdma misc; do grep -qw $c /sys/fs/cgroup/cgroup.controllers || { echo no $c; exit 1; }; done'
check 'user namespaces' '[ "$(setpriv --reuid=65534 --clear-groups unshare --user --map-root-user --net --pid --fork --mount-proc id -u)" = 0 ]'
check 'overlay in a user namespace' 'mkdir -m 777 -p /tmp/o; setpriv --reuid=65534 --clear-groups unshare --user --map-root-user --mount sh -ec "mount -t tmpfs none /tmp/o; cd /tmp/o; mkdir l u w m; mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m"'
check 'seccomp filters' 'grep -q "Seccomp_filters:" /proc/self/status && grep -qw errno /proc/sys/kernel/seccomp/actions_avail'
check 'the configuration of the kernel' 'zcat /proc/config.gz | grep -q CONFIG_WIREGUARD=y'
check 'the time of the node' '[ -c /dev/ptp0 ]'

# --- a tunnel that carries packets
check 'WireGuard between two namespaces' 'ip netns add a; ip netns add b; ip link add va netns a type veth peer name vb netns b
    for n in a b; do wg genkey > /tmp/$n.key; wg pubkey < /tmp/$n.key > /tmp/$n.pub; ip -n $n link add wg0 type wireguard; done
    ip -n a address add 10.0.9.1/30 dev va; ip -n b address add 10.0.9.2/30 dev vb; ip -n a link set va up; ip -n b link set vb up
    ip netns exec a wg set wg0 private-key /tmp/a.key listen-port 1000 peer $(cat /tmp/b.pub) allowed-ips 10.0.8.2/32 endpoint 10.0.9.2:1000
    ip netns exec b wg set wg0 private-key /tmp/b.key listen-port 1000 peer $(cat /tmp/a.pub) allowed-ips 10.0.8.1/32
    ip -n a address add 10.0.8.1/24 dev wg0; ip -n b address add 10.0.8.2/24 dev wg0; ip -n a link set wg0 up; ip -n b link set wg0 up
    ip netns exec a busybox ping -c 1 -W 20 10.0.8.2'
echo "facilities: $failed"
