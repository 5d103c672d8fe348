"""Check the network for collectives: HCCL's ports and interface on the host, the links of the devices, the rendezvous.

Names and defaults are those of CANN's reference of environment variables (HCCL_IF_BASE_PORT,
HCCL_HOST_SOCKET_PORT_RANGE, HCCL_SOCKET_IFNAME, HCCL_IF_IP).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable

from npu_bridge.doctor.findings import Finding, Group
from npu_bridge.doctor.host import Host

GROUP = Group("network")
BASE_PORT, PORTS = 60000, 16
HCCN_TOOLS = ("/usr/local/Ascend/driver/tools/hccn_tool",)
SEVERAL = "for jobs over several machines"


def port_range(host: Host) -> list[int] | None:
    """Ports that HCCL uses on this host; None where the system chooses them.

    Raises ValueError that names the invalid variable.
    """
    ranges = host.environment.get("HCCL_HOST_SOCKET_PORT_RANGE", "")
    if ranges == "auto":
        return None
    if ranges:
        ports: list[int] = []
        for part in ranges.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 0 < first <= last <= 65535:
                raise ValueError(f"HCCL_HOST_SOCKET_PORT_RANGE={ranges}: {part!r} is no port or range of 1 to 65535")
            ports += range(first, last + 1)
        return ports
    base = host.environment.get("HCCL_IF_BASE_PORT", str(BASE_PORT))
    if not base.isdigit() or not 1024 <= int(base) <= 65520:
        raise ValueError(f"HCCL_IF_BASE_PORT={base} is not a number of 1024 to 65520")
    return list(range(int(base), int(base) + PORTS))


def taken(ports: Iterable[int]) -> list[int]:
    """Return the ports that cannot be bound."""
    busy = []
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT does not hold the port
            try:
                s.bind(("", port))
            except OSError:
                busy.append(port)
    return busy


def _spans(ports: list[int]) -> str:
    """Format ports as ranges: [1, 2, 3, 7] -> 1-3,7."""
    spans: list[list[int]] = []
    for port in sorted(ports):
        if spans and port == spans[-1][1] + 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _reserved(text: str) -> set[int]:
    return {port for a, b in re.findall(r"(\d+)(?:-(\d+))?", text) for port in range(int(a), int(b or a) + 1)}


def check_ports(host: Host) -> Finding:
    """Check that HCCL's ports are free and outside the ephemeral range."""
    try:
        ports = port_range(host)
    except ValueError as error:
        return GROUP.failed("HCCL ports", str(error), "set HCCL_IF_BASE_PORT=60000, or leave it out")
    if ports is None:
        return GROUP.ok("HCCL ports", "chosen by the system (HCCL_HOST_SOCKET_PORT_RANGE=auto)")
    spans, busy = _spans(ports), taken(ports)
    if busy:
        return GROUP.failed("HCCL ports", f"of {spans}, {_spans(busy)} {'is' if len(busy) == 1 else 'are'} in use",
                            f"end the job that holds them (ss -ltnp | grep :{busy[0]}), or export "
                                f"HCCL_IF_BASE_PORT to {PORTS} free ports, the same on every machine")  # fmt: skip
    local = (host.text("/proc/sys/net/ipv4/ip_local_port_range") or "").split()
    kept = _reserved(host.text("/proc/sys/net/ipv4/ip_local_reserved_ports") or "")
    open_ = [p for p in ports if len(local) == 2 and int(local[0]) <= p <= int(local[1]) and p not in kept]
    if open_:
        return GROUP.unsure(
            "HCCL ports",
            f"{spans} are free now, but the system may give {_spans(open_)} to any program",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={spans}",
        )
    return GROUP.ok("HCCL ports", f"{spans} are free")


def interfaces(host: Host) -> dict[str, str]:
    """Return name -> state ("up", "down", "unknown") of the network interfaces."""
    return {
        path.name: (host.text(f"/sys/class/net/{path.name}/operstate") or "unknown").strip()
        for path in sorted(host.at("/sys/class/net").glob("*"))
        if path.is_dir()
    }


def chosen(names: Iterable[str], setting: str) -> list[str]:
    """Interfaces selected by HCCL_SOCKET_IFNAME: names with that prefix; `=` exact names; `^` all others."""
    words = setting.lstrip("^=").split(",")
    exact, others = "=" in setting[:2], setting.startswith("^")

    def hit(name):
        return any(name == word if exact else name.startswith(word) for word in words)

    return [name for name in names if hit(name) != others]


def check_interface(host: Host) -> Finding:
    """Check the interface over which the processes of a job find each other."""
    states = interfaces(host)
    usable = [name for name, state in states.items() if name != "lo" and state != "down"]
    listed = ", ".join(f"{name} ({state})" for name, state in states.items()) or "none"
    address = host.environment.get("HCCL_IF_IP")
    if address:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
            try:
                s.bind((address, 0))
            except OSError as error:
                return GROUP.failed(
                    "interface",
                    f"HCCL_IF_IP={address} is no address of this machine ({error.strerror})",
                    f"set it to one of `ip -br addr`, or leave it out; interfaces: {listed}",
                )
        return GROUP.ok("interface", f"HCCL_IF_IP={address}")
    setting = host.environment.get("HCCL_SOCKET_IFNAME")
    if setting:
        left = chosen(states, setting)
        if not left:
            return GROUP.failed(
                "interface",
                f"HCCL_SOCKET_IFNAME={setting} names none of {listed}",
                f"export HCCL_SOCKET_IFNAME={usable[0] if usable else 'lo'}",
            )
        if all(states[name] == "down" for name in left):
            return GROUP.failed(
                "interface",
                f"HCCL_SOCKET_IFNAME={setting} leaves {', '.join(left)}, which is down",
                f"export HCCL_SOCKET_IFNAME={usable[0] if usable else 'lo'}",
            )
        return GROUP.ok("interface", f"HCCL_SOCKET_IFNAME={setting}: {', '.join(left)}")
    virtual = [name for name in usable if name.startswith(("docker", "veth", "virbr", "br-", "tunl", "cali"))]
    if virtual and len(usable) > len(virtual):
        real = next(name for name in usable if name not in virtual)
        return GROUP.unsure(
            "interface",
            f"HCCL_SOCKET_IFNAME is not set, and {', '.join(virtual)} could be taken",
            f"{SEVERAL}: export HCCL_SOCKET_IFNAME={real} on every machine",
        )
    return GROUP.ok("interface", f"HCCL_SOCKET_IFNAME is not set; {', '.join(usable) or 'lo'}")


def check_rendezvous(host: Host) -> Finding:
    """Check that the loopback works, over which torch's local processes meet, and that the host name resolves."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        return GROUP.failed(
            "rendezvous",
            f"a connection to 127.0.0.1 fails: {error}",
            "bring the loopback up (ip link set lo up); a firewall must let 127.0.0.1 pass",
        )
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return GROUP.unsure(
            "rendezvous", f"the host name {name} has no address", f"add a line for {name} to /etc/hosts"
        )
    if address.startswith("127."):
        return GROUP.ok(
            "rendezvous",
            f"127.0.0.1 answers; {name} is {address}, so {SEVERAL} give torchrun the master's address, not its name",
        )
    return GROUP.ok("rendezvous", f"127.0.0.1 answers; {name} is {address}")


def check_links(host: Host, devices: int) -> list[Finding]:
    """Check the device network, used between machines: addresses of /etc/hccn.conf, links reported by hccn_tool."""
    text = host.text("/etc/hccn.conf")
    tool = host.find("hccn_tool") or next((str(host.at(path)) for path in HCCN_TOOLS if host.at(path).exists()), None)
    if text is None and tool is None:
        return [GROUP.left_out("device links", f"neither /etc/hccn.conf nor hccn_tool is here; they matter {SEVERAL}")]
    findings = []
    if text is not None:
        addresses = {int(n): a for n, a in re.findall(r"^address_(\d+)=(\S+)", text, re.MULTILINE)}
        twice = sorted({a for a in addresses.values() if list(addresses.values()).count(a) > 1})
        missing = [n for n in range(devices) if n not in addresses]
        if twice:
            findings.append(
                GROUP.failed(
                    "device addresses",
                    f"/etc/hccn.conf gives {', '.join(twice)} to several devices",
                    "hccn_tool -i <device> -ip -s address <address> netmask <mask>, one address a device",
                )
            )
        elif missing and addresses:
            findings.append(
                GROUP.unsure(
                    "device addresses",
                    f"/etc/hccn.conf has no address of device {', '.join(map(str, missing))}",
                    f"{SEVERAL}: hccn_tool -i {missing[0]} -ip -s address <address> netmask <mask>",
                )
            )
        else:
            findings.append(
                GROUP.ok(
                    "device addresses",
                    ", ".join(f"{n}: {a}" for n, a in sorted(addresses.items())) or "none in /etc/hccn.conf",
                )
            )
    if tool is not None:
        down = []
        for device in range(devices):
            done = host.run([tool, "-i", str(device), "-link", "-g"])
            if done is None or "UP" not in done.stdout.upper():
                down.append(device)
        findings.append(
            GROUP.unsure(
                "device links",
                f"no link at device {', '.join(map(str, down))}",
                f"{SEVERAL}: look at cable and switch port, then hccn_tool -i {down[0]} -link -g",
            )
            if down
            else GROUP.ok("device links", f"up at all {devices}")
        )
    return findings


def check(host: Host, kind: str, devices: int) -> list[Finding]:
    """Run all checks of this module; those of HCCL only for an NPU."""
    if kind != "npu":
        return [check_rendezvous(host)]
    if host.emulated:
        return [
            check_rendezvous(host),
            GROUP.left_out("HCCL ports and links", "the emulated HCCL goes over shared memory or ports of its own"),
        ]
    return [check_rendezvous(host), check_ports(host), check_interface(host), *check_links(host, devices)]
