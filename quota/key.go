package quota

import (
	"strings"
	"unicode/utf8"
)

const keyForm = "1 to 512 bytes of UTF-8, segments separated by '/', none of them empty"

// Key joins segments to a key. It escapes '/' and '%' inside a segment, so that an identifier which another party
// chose cannot add a segment, and different segments give different keys.
//
// The first segment is the key's group, and on Redis Cluster its hash tag: all keys that share it live in one slot, on
// one node. Put the segment that differs first: Key("203.0.113.9", "ip") and Key("42", "user") spread over the
// cluster, Key("ip", "203.0.113.9") and Key("user", "42") do not; a store of a cluster that gets thousands of keys of
// one group gives the notice "group". Better still is a key of one segment, and a limit for each kind of key. Keys that are
// charged together in one list should share their group: a tenant and its users, Key("team-7") and Key("team-7", "42").
func Key(segments ...string) string {
	var b strings.Builder
	for i, s := range segments {
		if i > 0 {
			b.WriteByte('/')
		}
		for j := 0; j < len(s); j++ {
			if c := s[j]; c == '/' || c == '%' {
				writeEscaped(&b, c)
			} else {
				b.WriteByte(c)
			}
		}
	}
	return b.String()
}

// CheckKey returns an ErrInvalid unless key is 1 to [MaxKey] bytes of UTF-8 whose segments, separated by '/', are not
// empty. Every other byte is accepted; stores escape the ones that are special to them.
func CheckKey(key string) error {
	if !validKey(key) {
		return invalid("key", key, keyForm)
	}
	return nil
}

// validKey looks at eight bytes at a time, for it is a part of every decision.
func validKey(key string) bool {
	if len(key) == 0 || len(key) > MaxKey {
		return false
	}
	all, slash := uint64(0), uint64(0x80) // all bytes in one, and 0x80 where a segment begins
	rest := key
	for ; len(rest) >= 8; rest = rest[8:] {
		w := word(rest)
		all |= w
		other := w ^ 0x2f2f2f2f2f2f2f2f // a byte of it is 0 where one of w is a slash; slashes has 0x80 there, and 0 elsewhere
		slashes := ^(other&0x7f7f7f7f7f7f7f7f + 0x7f7f7f7f7f7f7f7f | other | 0x7f7f7f7f7f7f7f7f)
		if slashes&(slashes<<8|slash) != 0 {
			return false
		}
		slash = slashes >> 56
	}
	for i := range len(rest) {
		all |= uint64(rest[i])
		switch {
		case rest[i] != '/':
			slash = 0
		case slash != 0:
			return false
		default:
			slash = 0x80
		}
	}
	return slash == 0 && (all&0x8080808080808080 == 0 || utf8.ValidString(key))
}

// word returns the first eight bytes of s as a number.
func word(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 | uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// Group returns the key's first segment: keys of one group stay together, on one node of a cluster, and a list of charges to
// them is decided in one step. So it should be small enough for one node, and as large as such lists need, see [Key].
func Group(key string) string {
	if i := strings.IndexByte(key, '/'); i >= 0 {
		return key[:i]
	}
	return key
}

const hexDigits = "0123456789ABCDEF"

func writeEscaped(b *strings.Builder, c byte) {
	b.WriteByte('%')
	b.WriteByte(hexDigits[c>>4])
	b.WriteByte(hexDigits[c&15])
}
