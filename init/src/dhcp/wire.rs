//! DHCP messages as bytes (RFC 2131, 2; options of RFC 2132).
//!
//! Written out here because PID 1 must outlive every datagram: decoding never panics, bounds everything, and looks only
//! at what the client uses. Options are kept as bytes and read by [`Message::address`] and its like, which give
//! nothing when a length is wrong.

use std::{collections::BTreeMap, net::Ipv4Addr};

const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// RFC 1542, 2.1: some relays drop what is shorter than a BOOTP message.
const LEAST_LENGTH: usize = 300;
const OPTIONS: usize = 240;

/// Options by number.
pub mod option {
    /// Network mask.
    pub const SUBNET_MASK: u8 = 1;
    /// Routers, the preferred first.
    pub const ROUTER: u8 = 3;
    /// Name servers, the preferred first.
    pub const DOMAIN_NAME_SERVER: u8 = 6;
    /// The address the client asks for.
    pub const REQUESTED_ADDRESS: u8 = 50;
    /// How long the address may be used, seconds.
    pub const LEASE_TIME: u8 = 51;
    /// The `file` and `sname` fields hold options too.
    pub const OVERLOAD: u8 = 52;
    /// What kind of message it is.
    pub const MESSAGE_TYPE: u8 = 53;
    /// Which server.
    pub const SERVER_IDENTIFIER: u8 = 54;
    /// What the client would like to know.
    pub const PARAMETER_REQUEST_LIST: u8 = 55;
    /// T1, seconds.
    pub const RENEWAL_TIME: u8 = 58;
    /// T2, seconds.
    pub const REBINDING_TIME: u8 = 59;
    /// Which client.
    pub const CLIENT_IDENTIFIER: u8 = 61;
    pub(super) const PAD: u8 = 0;
    pub(super) const END: u8 = 255;
}

/// Kinds of messages by number.
pub mod kind {
    /// A client looks for servers.
    pub const DISCOVER: u8 = 1;
    /// A server offers an address.
    pub const OFFER: u8 = 2;
    /// A client takes or renews one.
    pub const REQUEST: u8 = 3;
    /// The server agrees.
    pub const ACK: u8 = 5;
    /// The server refuses.
    pub const NAK: u8 = 6;
}

/// A message, as far as a client on Ethernet cares.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// From a server.
    pub reply: bool,
    /// Which exchange.
    pub transaction: u32,
    /// Since the exchange began.
    pub seconds: u16,
    /// Answer by broadcast, please.
    pub broadcast: bool,
    /// The client's address, if it has one.
    pub client: Option<Ipv4Addr>,
    /// The address given.
    pub yours: Option<Ipv4Addr>,
    /// The client's hardware address.
    pub mac: [u8; 6],
    /// Options. One that comes in pieces is put together (RFC 3396).
    pub options: BTreeMap<u8, Vec<u8>>,
}

impl Message {
    /// Reads a message; nothing if it is none, or not for Ethernet.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let at = |offset: usize| bytes.get(offset..)?.first_chunk::<4>().copied();
        let address = |offset| at(offset).map(Ipv4Addr::from);
        let [op, hardware_type, hardware_length, _] = at(0)?;
        if !(1..=2).contains(&op) || hardware_type != 1 || hardware_length != 6 || at(236)? != MAGIC {
            return None;
        }
        let [s0, s1, f0, _] = at(8)?;
        let some = |a: Ipv4Addr| (!a.is_unspecified()).then_some(a);
        let mut options = BTreeMap::new();
        read_options(bytes.get(OPTIONS..)?, &mut options);
        // RFC 2131, 4.1: first the options field, then `file`, then `sname`.
        let overload = options.get(&option::OVERLOAD).and_then(|o| o.first()).copied().unwrap_or(0);
        if overload & 1 != 0 {
            read_options(bytes.get(108..236)?, &mut options);
        }
        if overload & 2 != 0 {
            read_options(bytes.get(44..108)?, &mut options);
        }
        Some(Self {
            reply: op == 2,
            transaction: u32::from_be_bytes(at(4)?),
            seconds: u16::from_be_bytes([s0, s1]),
            broadcast: f0 & 0x80 != 0,
            client: some(address(12)?),
            yours: some(address(16)?),
            mac: *bytes.get(28..)?.first_chunk()?,
            options,
        })
    }

    /// Writes a message.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![if self.reply { 2 } else { 1 }, 1, 6, 0];
        bytes.extend(self.transaction.to_be_bytes());
        bytes.extend(self.seconds.to_be_bytes());
        bytes.extend([if self.broadcast { 0x80 } else { 0 }, 0]);
        for address in [self.client, self.yours, None, None] {
            bytes.extend(address.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
        }
        bytes.extend(self.mac);
        bytes.resize(236, 0);
        bytes.extend(MAGIC);
        for (code, value) in &self.options {
            // RFC 3396: what is too long for one option goes into several.
            for piece in value.chunks(255) {
                bytes.extend([*code, u8::try_from(piece.len()).unwrap_or(u8::MAX)]);
                bytes.extend(piece);
            }
        }
        bytes.push(option::END);
        bytes.resize(bytes.len().max(LEAST_LENGTH), 0);
        bytes
    }

    /// The kind of message; 0 if it says none.
    pub fn kind(&self) -> u8 {
        match self.options.get(&option::MESSAGE_TYPE).map(Vec::as_slice) {
            Some([kind]) => *kind,
            _ => 0,
        }
    }

    /// An option that is one address.
    pub fn address(&self, code: u8) -> Option<Ipv4Addr> {
        <[u8; 4]>::try_from(self.options.get(&code)?.as_slice()).ok().map(Into::into)
    }

    /// An option that is a list of addresses. An incomplete last one is left out.
    pub fn addresses(&self, code: u8) -> impl Iterator<Item = Ipv4Addr> {
        let bytes = self.options.get(&code).map(Vec::as_slice).unwrap_or_default();
        bytes.as_chunks::<4>().0.iter().copied().map(Into::into)
    }

    /// An option that is a 32-bit number.
    pub fn number(&self, code: u8) -> Option<u32> {
        <[u8; 4]>::try_from(self.options.get(&code)?.as_slice()).ok().map(u32::from_be_bytes)
    }
}

fn read_options(mut bytes: &[u8], options: &mut BTreeMap<u8, Vec<u8>>) {
    while let [code, rest @ ..] = bytes {
        match *code {
            option::PAD => bytes = rest,
            option::END => return,
            code => {
                let Some((length, rest)) = rest.split_first() else { return };
                let Some((value, rest)) = rest.split_at_checked(usize::from(*length)) else { return };
                options.entry(code).or_default().extend(value);
                bytes = rest;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> impl Strategy<Value = Message> {
        let options =
            proptest::collection::btree_map(1_u8..255, proptest::collection::vec(any::<u8>(), 1..300), 0..9);
        let fields = (any::<bool>(), any::<u32>(), any::<u16>(), any::<bool>(), any::<[u8; 6]>());
        (fields, any::<u32>(), any::<u32>(), options).prop_map(|(fields, client, yours, mut options)| {
            options.remove(&option::OVERLOAD);
            let (reply, transaction, seconds, broadcast, mac) = fields;
            let address = |a: u32| (a != 0).then(|| a.into());
            let (client, yours) = (address(client), address(yours));
            Message { reply, transaction, seconds, broadcast, client, yours, mac, options }
        })
    }

    proptest! {
        #[test]
        fn reads_what_it_writes(message in messages()) {
            prop_assert_eq!(Message::decode(&message.encode()), Some(message));
        }

        #[test]
        fn survives_damage(message in messages(), at: prop::sample::Index, to: u8, cut: prop::sample::Index) {
            let mut bytes = message.encode();
            let at = at.index(bytes.len());
            bytes[at] = to;
            Message::decode(&bytes);
            Message::decode(&bytes[..cut.index(bytes.len())]);
        }
    }

    #[test]
    fn reads_overloaded_fields() {
        let mut message = Message::default();
        message.options.insert(option::OVERLOAD, vec![3]);
        let mut bytes = message.encode();
        bytes[108..115].copy_from_slice(&[option::SUBNET_MASK, 4, 255, 255, 0, 0, option::END]);
        bytes[44..51].copy_from_slice(&[option::ROUTER, 4, 10, 0, 0, 1, option::END]);
        let message = Message::decode(&bytes).unwrap();
        assert_eq!(message.address(option::SUBNET_MASK), Some(Ipv4Addr::new(255, 255, 0, 0)));
        assert_eq!(message.addresses(option::ROUTER).collect::<Vec<_>>(), [Ipv4Addr::new(10, 0, 0, 1)]);
        assert_eq!(message.number(option::LEASE_TIME), None);
    }
}
