"""Ports, interfaces and links: settings that cannot work are named with the command that fixes them."""

import socket
import subprocess

import pytest

from npu_bridge.doctor import Host, Outcome, network


def host(tmp_path, **environment):
    return Host(root=tmp_path, environment=environment, find=lambda name: None)


def interface(tmp_path, **states):
    for name, state in states.items():
        folder = tmp_path / "sys/class/net" / name
        folder.mkdir(parents=True)
        (folder / "operstate").write_text(state + "\n")


@pytest.mark.parametrize(
    "environment, ports",
    [
        ({}, list(range(60000, 60016))),
        ({"HCCL_IF_BASE_PORT": "50000"}, list(range(50000, 50016))),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "auto"}, None),
        ({"HCCL_HOST_SOCKET_PORT_RANGE": "60000,60050-60052", "HCCL_IF_BASE_PORT": "1"}, [60000, 60050, 60051, 60052]),
    ],
)
def test_the_ports_are_those_of_the_settings(tmp_path, environment, ports):
    assert network.port_range(host(tmp_path, **environment)) == ports


@pytest.mark.parametrize(
    "environment", [{"HCCL_IF_BASE_PORT": "80"}, {"HCCL_IF_BASE_PORT": "many"}, {"HCCL_HOST_SOCKET_PORT_RANGE": "5-1"}]
)
def test_settings_that_are_no_ports_fail_by_name(tmp_path, environment):
    finding = network.check_ports(host(tmp_path, **environment))
    assert finding.outcome is Outcome.FAILED and next(iter(environment)) in finding.found


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        finding = network.check_ports(host(tmp_path, HCCL_HOST_SOCKET_PORT_RANGE=str(port)))
    assert (
        finding.outcome is Outcome.FAILED
        and f"{port} is in use" in finding.found
        and "HCCL_IF_BASE_PORT" in finding.fix
    )


def test_ports_that_the_system_may_give_away_are_to_be_reserved(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "taken", lambda ports: [])
    folder = tmp_path / "proc/sys/net/ipv4"
    folder.mkdir(parents=True)
    (folder / "ip_local_port_range").write_text("32768\t60999\n")
    (folder / "ip_local_reserved_ports").write_text("60000-60009\n")
    finding = network.check_ports(host(tmp_path))
    assert (
        finding.outcome is Outcome.UNSURE
        and "60010-60015" in finding.found
        and finding.fix == "sysctl -w net.ipv4.ip_local_reserved_ports=60000-60015"
    )
    (folder / "ip_local_reserved_ports").write_text("60000-60015\n")
    assert network.check_ports(host(tmp_path)).outcome is Outcome.OK


@pytest.mark.parametrize(
    "setting, left",
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("^eth", ["lo", "docker0"]),
        ("^=eth0,docker0", ["lo", "eth1"]),
        ("ib", []),
    ],
)
def test_an_interface_setting_chooses_by_beginning_by_name_or_by_exclusion(setting, left):
    assert network.chosen(["lo", "eth0", "eth1", "docker0"], setting) == left


def test_an_interface_that_is_not_there_or_down_fails(tmp_path):
    interface(tmp_path, lo="unknown", eth0="up", eth1="down")
    for name, words in (("ib0", "names none of"), ("eth1", "which is down")):
        finding = network.check_interface(host(tmp_path, HCCL_SOCKET_IFNAME=name))
        assert (
            finding.outcome is Outcome.FAILED
            and words in finding.found
            and finding.fix == "export HCCL_SOCKET_IFNAME=eth0"
        )
    assert network.check_interface(host(tmp_path, HCCL_SOCKET_IFNAME="=eth0")).outcome is Outcome.OK


def test_a_bridge_of_containers_beside_a_real_interface_is_doubtful(tmp_path):
    interface(tmp_path, lo="unknown", docker0="up", eth0="up")
    finding = network.check_interface(host(tmp_path))
    assert finding.outcome is Outcome.UNSURE and "HCCL_SOCKET_IFNAME=eth0" in finding.fix


def test_an_address_of_another_machine_fails(tmp_path):
    finding = network.check_interface(host(tmp_path, HCCL_IF_IP="203.0.113.7"))  # a documentation address: nobody's
    assert finding.outcome is Outcome.FAILED and "no address of this machine" in finding.found


def test_addresses_and_links_of_the_devices_are_read(tmp_path, monkeypatch):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hccn.conf").write_text("address_0=192.168.1.1\nnetmask_0=255.255.255.0\naddress_1=192.168.1.1\n")

    def answer(self, command, timeout=30):
        return subprocess.CompletedProcess(command, 0, f"link status: {'UP' if command[2] == '0' else 'DOWN'}\n", "")

    monkeypatch.setattr(Host, "run", answer)
    one = Host(root=tmp_path, environment={}, find=lambda name: "/usr/bin/" + name)
    addresses, links = network.check_links(one, 2)
    assert addresses.outcome is Outcome.FAILED and "192.168.1.1 to several devices" in addresses.found
    assert links.outcome is Outcome.UNSURE and "device 1" in links.found and "hccn_tool -i 1" in links.fix


def test_the_loopback_answers_here(tmp_path):
    assert network.check_rendezvous(host(tmp_path)).outcome in (Outcome.OK, Outcome.UNSURE)
