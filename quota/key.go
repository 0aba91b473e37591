package quota

import (
	"strings"
	"unicode/utf8"
)

const keyForm = "1 to 512 bytes of UTF-8, segments separated by '/', none of them empty"

// Key joins segments to a key. A '/' or '%' inside a segment is escaped, so an identifier that
// somebody else chose cannot add a segment, and different segments give different keys.
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

// CheckKey returns an ErrInvalid unless key is 1 to [MaxKey] bytes of UTF-8 whose segments, separated
// by '/', are not empty. Every other byte is accepted: [AppendKey] escapes what stores treat specially.
func CheckKey(key string) error {
	if !validKey(key) {
		return invalid("key", key, keyForm)
	}
	return nil
}

func validKey(key string) bool {
	if len(key) == 0 || len(key) > MaxKey {
		return false
	}
	empty, all := true, byte(0) // whether the segment is, and all bytes in one
	for i := 0; i < len(key); i++ {
		c := key[i]
		all |= c
		if c != '/' {
			empty = false
			continue
		}
		if empty {
			return false
		}
		empty = true
	}
	return !empty && (all < utf8.RuneSelf || utf8.ValidString(key))
}

// Group returns the key's first segment, its co-location group.
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
