//! Addresses of internet sockets: ip(7), ipv6(7).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use serde::{Deserialize, Serialize};

/// An address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Address {
    /// The address; that of an IPv4 peer of an IPv6 socket is mapped (`::ffff:127.0.0.1`).
    pub ip: IpAddr,
    /// The port; of an ICMP socket, the identifier. 0 without one.
    pub port: u16,
    /// `sin6_scope_id`: index of the interface of a link-local address.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub scope: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(scope: &u32) -> bool {
    *scope == 0
}

impl Address {
    /// From `struct sockaddr_in` or `struct sockaddr_in6`; `None` for other families.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
        match i32::from(family) {
            libc::AF_INET => {
                let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
                Some(Self::new(Ipv4Addr::from(octets), port))
            }
            libc::AF_INET6 => {
                let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
                Some(Self {
                    scope: u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?),
                    ..Self::new(Ipv6Addr::from(octets), port)
                })
            }
            _ => None,
        }
    }

    /// Without a scope.
    pub fn new(ip: impl Into<IpAddr>, port: u16) -> Self {
        Self {
            ip: ip.into(),
            port,
            scope: 0,
        }
    }

    /// The unspecified address of a family, without a port.
    pub fn unspecified(family: i32) -> Self {
        match family {
            libc::AF_INET6 => Self::new(Ipv6Addr::UNSPECIFIED, 0),
            _ => Self::new(Ipv4Addr::UNSPECIFIED, 0),
        }
    }

    /// `AF_INET` or `AF_INET6`.
    pub fn family(self) -> i32 {
        match self.ip {
            IpAddr::V4(_) => libc::AF_INET,
            IpAddr::V6(_) => libc::AF_INET6,
        }
    }

    /// `struct sockaddr_in` or `struct sockaddr_in6`.
    pub fn sockaddr(self) -> Vec<u8> {
        let mut bytes = (self.family() as u16).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&self.port.to_be_bytes());
        match self.ip {
            IpAddr::V4(ip) => {
                bytes.extend_from_slice(&ip.octets());
                bytes.extend_from_slice(&[0; 8]);
            }
            IpAddr::V6(ip) => {
                bytes.extend_from_slice(&[0; 4]);
                bytes.extend_from_slice(&ip.octets());
                bytes.extend_from_slice(&self.scope.to_ne_bytes());
            }
        }
        bytes
    }

    /// The same for comparisons: a mapped IPv4 address as an IPv4 one, without a scope.
    pub fn plain(self) -> (IpAddr, u16) {
        (self.ip.to_canonical(), self.port)
    }

    /// The same port at that address.
    pub fn at(self, ip: IpAddr) -> Self {
        Self { ip, ..self }
    }

    /// Whether it covers all addresses of its family.
    pub fn is_any(self) -> bool {
        self.ip.is_unspecified()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V6(ip) => SocketAddrV6::new(ip, self.port, 0, self.scope).fmt(f),
            IpAddr::V4(_) => SocketAddr::new(self.ip, self.port).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "127.0.0.1:80",
            "[::1]:4000",
            "[::ffff:10.0.0.1]:1",
            "[fe80::1%3]:5",
            "0.0.0.0:0",
        ] {
            let address: SocketAddr = text.parse().unwrap();
            let mut ours = Address::new(address.ip(), address.port());
            if let SocketAddr::V6(six) = address {
                ours.scope = six.scope_id();
            }
            assert_eq!(Address::parse(&ours.sockaddr()), Some(ours));
            assert_eq!(ours.to_string(), text);
        }
        assert_eq!(Address::parse(&[1, 0, 0, 0]), None);
        assert_eq!(Address::parse(&[2, 0, 0, 80, 127]), None);
        let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
        assert_eq!(
            Address::new(mapped, 9).plain(),
            (Ipv4Addr::LOCALHOST.into(), 9)
        );
    }
}
