package engine

// Slots is the number of hash slots of a Redis Cluster.
const Slots = 16384

// slot returns the hash slot of a key that begins with its hash tag, "{group}": the CRC16 (XMODEM) of the
// bytes between the braces, see the Redis Cluster specification, "Hash tags".
func slot[T string | []byte](key T) uint16 {
	var crc uint16
	for i := 1; key[i] != '}'; i++ {
		crc = crc<<8 ^ crc16[byte(crc>>8)^key[i]]
	}
	return crc % Slots
}

var crc16 = func() (table [256]uint16) {
	for i := range table {
		crc := uint16(i) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
		table[i] = crc
	}
	return table
}()
