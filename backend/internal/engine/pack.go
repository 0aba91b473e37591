package engine

import (
	"fmt"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A state is kept as bytes: its header, which is the length and the name of its rule and its unit, then
// A, B and, where they are not zero, C and the tail. A number is 7 bytes in two's complement, the highest
// first, so a token bucket takes 25 bytes, and one size class less in Redis than as text.
const numberSize = 7

func appendNumber(dst []byte, n int64) []byte {
	return append(dst, byte(n>>48), byte(n>>40), byte(n>>32), byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

func number(s string) int64 {
	return int64(s[0])<<48 | int64(s[1])<<40 | int64(s[2])<<32 | int64(s[3])<<24 | int64(s[4])<<16 | int64(s[5])<<8 | int64(s[6])
}

// signed is number for one that may be below 0, as states of rules without Lua may have.
func signed(s string) int64 { return number(s) << 8 >> 8 }

// header returns the first bytes of a state of a rule in a unit.
func header(rule quota.Rule, unit int64) string {
	name := rule.String()
	return string(appendNumber(append([]byte{byte(len(name))}, name...), unit))
}

// pack returns the bytes of an item.
func pack(it *driver.Item) string {
	s := &it.State
	dst := appendNumber(appendNumber([]byte(header(it.Rule, s.Unit)), s.A), s.B)
	if s.C != 0 || len(s.Tail) > 0 {
		dst = appendNumber(dst, s.C)
	}
	for _, n := range s.Tail {
		dst = appendNumber(dst, n)
	}
	return string(dst)
}

// unpack reads what pack, or a script, wrote; no bytes are the zero Item. Anything else is ErrMisconfigured.
func unpack(v string) (it driver.Item, err error) {
	if v == "" {
		return it, nil
	}
	n := 1 + int(v[0])
	rest := len(v) - n - 3*numberSize
	if n == 1 || n > 1+len(it.Rule) || rest < 0 || rest%numberSize != 0 || rest/numberSize > 1+quota.MaxTail || strings.IndexByte(v[1:n], 0) >= 0 {
		return it, errState
	}
	copy(it.Rule[:], v[1:n])
	s := &it.State
	s.Unit, s.A, s.B = signed(v[n:]), signed(v[n+numberSize:]), signed(v[n+2*numberSize:])
	sound := s.Unit > 0 && exact(s.Unit) && exact(s.A) && exact(s.B)
	if rest > 0 {
		s.C = signed(v[n+3*numberSize:])
		sound = sound && exact(s.C)
		if rest > numberSize {
			s.Tail = make([]int64, 0, rest/numberSize-1)
			for i := n + 4*numberSize; i < len(v); i += numberSize {
				x := signed(v[i:])
				sound = sound && exact(x)
				s.Tail = append(s.Tail, x)
			}
		}
	}
	if !sound {
		return driver.Item{}, errState
	}
	return it, nil
}

func exact(n int64) bool { return -quota.MaxNumber <= n && n <= quota.MaxNumber }

var errState = fmt.Errorf("redis: %w: the store holds what is no state of a limit", quota.ErrMisconfigured)
