//! The packet header on the virtqueues (VIRTIO 1.2, section 5.10.6): 44 little-endian bytes, then `len` bytes of payload.
//!
//! Parsing never fails: a header is a plain record of numbers that a hostile guest chose. What they mean, and whether they may be
//! believed, is decided by whoever looks at them. The header is copied out of guest memory before it is read, so that it cannot change
//! under a check. Where its bytes lie in the descriptors is nobody's business here (2.7.4: message framing is the driver's choice;
//! a Linux guest that sends with MSG_ZEROCOPY scatters one payload over many descriptors, which is why the packet type of the crate
//! `virtio-vsock`, header and payload in at most two descriptors, is not used).

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// `type` of a stream socket, the only one offered.
pub const TYPE_STREAM: u16 = 1;
/// Most payload bytes in one packet, either way; Linux's driver sends no more either.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// SHUTDOWN flag: the sender of the packet will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender of the packet will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions are closed.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks or says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// It is open.
    Response = 2,
    /// There is no such connection, or no more.
    Reset = 3,
    /// Some direction of it closes: the flags say which.
    Shutdown = 4,
    /// Payload.
    Data = 5,
    /// Here is my credit.
    CreditUpdate = 6,
    /// Tell me your credit.
    CreditRequest = 7,
}

impl Op {
    /// The operation numbered `number`, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context id it comes from.
    pub src_cid: u64,
    /// Context id it goes to.
    pub dst_cid: u64,
    /// Port it comes from.
    pub src_port: u32,
    /// Port it goes to.
    pub dst_port: u32,
    /// Payload bytes.
    pub len: u32,
    /// Socket type: [`TYPE_STREAM`].
    pub kind: u16,
    /// An [`Op`]'s number.
    pub op: u16,
    /// SHUTDOWN flags.
    pub flags: u32,
    /// Size of the sender's receive buffer for this stream, bytes.
    pub buf_alloc: u32,
    /// Bytes of this stream that the sender took out of its receive buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Bytes of a header.
    pub const SIZE: usize = 44;

    /// The header in `bytes`.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let mut rest = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(rest.take()),
            dst_cid: u64::from_le_bytes(rest.take()),
            src_port: u32::from_le_bytes(rest.take()),
            dst_port: u32::from_le_bytes(rest.take()),
            len: u32::from_le_bytes(rest.take()),
            kind: u16::from_le_bytes(rest.take()),
            op: u16::from_le_bytes(rest.take()),
            flags: u32::from_le_bytes(rest.take()),
            buf_alloc: u32::from_le_bytes(rest.take()),
            fwd_cnt: u32::from_le_bytes(rest.take()),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; Self::SIZE];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The reset that answers this packet: same connection, same type, the other way.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        // The fields' sizes add up to the header's, so there is always enough; zeros beat a panic if someone breaks that.
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_standards() {
        let bytes: [u8; Header::SIZE] = std::array::from_fn(|index| index as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, u32::from_le_bytes([20, 21, 22, 23]));
        assert_eq!(header.len, u32::from_le_bytes([24, 25, 26, 27]));
        assert_eq!((header.kind, header.op), (u16::from_le_bytes([28, 29]), u16::from_le_bytes([30, 31])));
        assert_eq!(header.fwd_cnt, u32::from_le_bytes([40, 41, 42, 43]));
        assert_eq!(header.encode(), bytes);
    }
}
