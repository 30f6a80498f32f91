# podman, with and without root, and Docker in a sliver: each runs a container of an image made here, and serves a page through a published
# port. Run by init.sh as root in a sliver of the base `containers`, after facilities.sh.
step() { echo "containers: $(cut -d' ' -f1 /proc/uptime)s $*"; }
# serves PORT: whether the page is there; the server needs a moment to listen, and until then connections are refused.
serves() {
    local tries
    for tries in $(seq 100); do
        [ "$(busybox wget -q -O - "http://127.0.0.1:$1/" 2>/dev/null)" = 'hello from a container' ] && return
        busybox usleep 100000
    done
    echo "nothing serves port $1"
    return 1
}

containers() {
    set -e
    local image=/tmp/image
    mkdir -p $image/bin $image/www $image/tmp
    cp /bin/busybox $image/bin/
    for applet in sh echo httpd id cat; do ln $image/bin/busybox $image/bin/$applet; done
    echo hello from a container > $image/www/index.html
    tar -C $image -cf /tmp/image.tar .
    local server=(/bin/httpd -f -p 80 -h /www)

    # No systemd here: control groups are made in the file system, and events are kept in a file.
    mkdir -p /etc/containers
    printf '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n[containers]\nlog_driver = "k8s-file"\n[network]\nnetwork_backend = "netavark"\n' > /etc/containers/containers.conf
    # Control groups with processes of their own have no children that are controlled.
    mkdir /sys/fs/cgroup/init
    for process in $(cat /sys/fs/cgroup/cgroup.procs); do echo $process > /sys/fs/cgroup/init/cgroup.procs 2>/dev/null || true; done

    step podman, as root
    podman import -q /tmp/image.tar tiny > /dev/null
    [ "$(podman info -f '{{.Store.GraphDriverName}}')" = overlay ]
    [ "$(podman run --rm --memory 64m --pids-limit 50 tiny /bin/echo hi)" = hi ]
    podman run -d --name web -p 8080:80 tiny "${server[@]}" > /dev/null
    serves 8080
    podman rm -f -t 0 web > /dev/null

    step podman, as a user
    useradd -m tenant
    mkdir -p /run/user/1000
    chown tenant: /run/user/1000
    chmod 0644 /tmp/image.tar
    as_tenant() { (cd /home/tenant && setpriv --reuid=tenant --regid=tenant --init-groups env HOME=/home/tenant USER=tenant XDG_RUNTIME_DIR=/run/user/1000 "$@"); }
    as_tenant podman import -q /tmp/image.tar tiny > /dev/null
    [ "$(as_tenant podman run --rm tiny /bin/id -u)" = 0 ]
    as_tenant podman run -d --name web -p 8081:80 tiny "${server[@]}" > /dev/null
    serves 8081
    as_tenant podman rm -f -t 0 web > /dev/null

    step Docker
    dockerd --log-level error > /var/log/dockerd 2>&1 &
    until docker version > /dev/null 2>&1; do kill -0 %1 || { cat /var/log/dockerd; return 1; }; done
    step Docker is up
    docker import /tmp/image.tar tiny > /dev/null
    [ "$(docker info -f '{{.Driver}}')" = overlay2 ]
    [ "$(docker run --rm --memory 64m --pids-limit 50 tiny /bin/echo hi)" = hi ]
    docker run -d --name web -p 8082:80 tiny "${server[@]}" > /dev/null
    serves 8082
    docker rm -f web > /dev/null
    step done
}
(containers)
status=$?
[ $status = 0 ] || { echo "FAILED containers: status $status"; tail -n 20 /var/log/dockerd 2>/dev/null; }
