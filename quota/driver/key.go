package driver

import (
	"strings"

	"github.com/fleetquota/fleetquota/quota"
)

// AppendKey appends the text under which stores keep a limit and key, and returns the extended slice:
// "{group}/rest:limit", or "{group}:limit" where the key is one segment. Braces, '%', ':', spaces and control bytes of
// the key are written as '%' and two hexadecimal digits. The text is injective: different limits or keys have different
// texts. Its braces hold the group alone, so that Redis Cluster places keys of one group in one slot, and no key can
// choose another group's slot.
func AppendKey(dst []byte, limit, key string) []byte {
	group := quota.Group(key)
	dst = AppendGroup(dst, group)
	dst = AppendEscaped(dst, key[len(group):])
	dst = append(dst, ':')
	return append(dst, limit...)
}

// AppendGroup appends "{group}", escaped as in [AppendKey]: the hash tag of a group's keys.
func AppendGroup(dst []byte, group string) []byte {
	dst = append(dst, '{')
	dst = AppendEscaped(dst, group)
	return append(dst, '}')
}

// KeyGroup returns the group of a key that [AppendKey] or [AppendIDKey] made, escaped as in it: keys of one group have one
// text, which a database can use as a partition key. It is "" for any other text.
func KeyGroup(key string) string {
	end := strings.IndexByte(key, '}')
	if end < 1 || key[0] != '{' {
		return ""
	}
	return key[1:end]
}

func special(c byte) bool {
	return c <= ' ' || c == 0x7f || c == '{' || c == '}' || c == '%' || c == ':'
}

const hexDigits = "0123456789ABCDEF"

// AppendEscaped appends s with its special bytes escaped, as in [AppendKey].
func AppendEscaped(dst []byte, s string) []byte {
	for i := 0; i < len(s); i++ {
		if c := s[i]; special(c) {
			dst = append(dst, '%', hexDigits[c>>4], hexDigits[c&15])
		} else {
			dst = append(dst, c)
		}
	}
	return dst
}

// AppendIDKey appends the text under which stores keep a request id of a group: "{group}#id", escaped as in
// [AppendKey]. The key of a limit never has '#' behind its group.
func AppendIDKey(dst []byte, group, id string) []byte {
	dst = append(AppendGroup(dst, group), '#')
	return AppendEscaped(dst, id)
}
