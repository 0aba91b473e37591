package engine

import (
	"fmt"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A state is kept as bytes: the header, which is the length and the name of the rule and the unit, then A, B
// and, if they are not zero, C and the tail. A number is 7 bytes in two's complement, the highest byte first.
// A token bucket takes 25 bytes, and in Redis one size class less than it would as text.
const numberSize = 7

func appendNumber(dst []byte, n int64) []byte {
	return append(dst, byte(n>>48), byte(n>>40), byte(n>>32), byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

func number(s string) int64 {
	return int64(s[0])<<48 | int64(s[1])<<40 | int64(s[2])<<32 | int64(s[3])<<24 | int64(s[4])<<16 | int64(s[5])<<8 | int64(s[6])
}

// signed reads a number that may be negative. Only rules without Lua have such numbers.
func signed(s string) int64 { return number(s) << 8 >> 8 }

// header returns the first bytes of a state: rule and unit.
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

// unpack reads the bytes that pack, or a script, wrote; the empty text is the zero Item. It fails with
// ErrMisconfigured if the bytes are no state.
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

// exact reports whether Lua holds a number exactly.
func exact(n int64) bool { return -quota.MaxNumber <= n && n <= quota.MaxNumber }

var errState = fmt.Errorf("redis: %w: the key holds a value that is no state of a limit", quota.ErrMisconfigured)
